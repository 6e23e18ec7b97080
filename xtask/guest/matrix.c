/* Double matrix product: matrix N ROUNDS. Compiled once for SSE2 and once for AVX2. */
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    size_t n = strtoul(argv[1], 0, 10), rounds = strtoul(argv[2], 0, 10);
    double *a = malloc(n * n * sizeof *a), *b = malloc(n * n * sizeof *b);
    double *c = calloc(n * n, sizeof *c);
    if (!a || !b || !c)
        return 1;
    for (size_t i = 0; i < n * n; i++) {
        a[i] = (double)(i % 13) / 7;
        b[i] = (double)(i % 17) / 3;
    }
    for (size_t r = 0; r < rounds; r++)
        for (size_t i = 0; i < n; i++)
            for (size_t k = 0; k < n; k++) {
                double f = a[i * n + k];
                for (size_t j = 0; j < n; j++)
                    c[i * n + j] += f * b[k * n + j];
            }
    printf("%.6f\n", c[n * n / 2 + n / 2]);
    return 0;
}
