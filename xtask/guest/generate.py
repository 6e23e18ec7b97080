"""Prints a C file for the compiler workload: generate.py FUNCTIONS."""

import sys

print("#include <stddef.h>\n#include <stdint.h>")
print("struct node { struct node *next; uint64_t key; double weight; };")
for n in range(int(sys.argv[1])):
    a, b, c = n * 7 % 31 + 2, n * 11 % 23 + 3, n * 13 % 17 + 1
    print(f"""
uint64_t function_{n}(struct node *list, const uint32_t *words, size_t count, double scale)
{{
    uint64_t sum = {n}, buckets[{a}] = {{ 0 }};
    double total = scale * {b}.5;
    for (size_t i = 0; i < count; i++) {{
        uint32_t w = words[i];
        switch (w % {b}) {{
        case 0: sum += w * {a}u; break;
        case 1: sum ^= (uint64_t)w << {c}; break;
        case 2: sum -= w / {c}u; total += (double)w / {a}; break;
        default: buckets[w % {a}] += w >> {c % 7}; break;
        }}
    }}
    for (struct node *p = list; p; p = p->next)
        total += p->key % {c + 1} ? p->weight * {b} : 1;
    sum = sum * 31 + buckets[{a // 2}];
    return sum + (uint64_t)total{f" + function_{n - 1}(list, words, count / 2, total)" if n % 6 else ""};
}}""")
