/* Shuffle, pointer chase and shell sort over 4 MiB of 32-bit words: memory ROUNDS. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { WORDS = 1 << 20 };
static uint32_t next[WORDS], keys[WORDS];

static uint64_t seed = 1;
static uint32_t noise(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return seed >> 32;
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    uint32_t at = 0, sum = 0;
    for (unsigned long r = strtoul(argv[1], 0, 10); r; r--) {
        /* One cycle through all words (Sattolo). */
        for (uint32_t i = 0; i < WORDS; i++)
            next[i] = i;
        for (uint32_t i = WORDS - 1; i; i--) {
            uint32_t j = noise() % i, t = next[i];
            next[i] = next[j];
            next[j] = t;
        }
        for (uint32_t i = 0; i < 2 * WORDS; i++)
            at = next[at];
        sum += at;
        for (uint32_t i = 0; i < WORDS; i++)
            keys[i] = noise();
        for (uint32_t gap = WORDS / 2; gap; gap = gap == 2 ? 1 : gap * 5 / 11)
            for (uint32_t i = gap; i < WORDS; i++) {
                uint32_t j = i, key = keys[i];
                for (; j >= gap && keys[j - gap] > key; j -= gap)
                    keys[j] = keys[j - gap];
                keys[j] = key;
            }
        sum += keys[WORDS / 2];
    }
    printf("%u\n", sum);
    return 0;
}
