"""N-body, then dictionaries and sorting: bench.py STEPS WORDS."""

import math
import sys

BODIES = [
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 39.5],
    [4.84, -1.16, -0.10, 0.61, 2.81, -0.02, 0.037],
    [8.34, 4.12, -0.40, -1.01, 1.82, 0.008, 0.011],
    [12.9, -15.1, -0.22, 1.08, 0.87, -0.01, 0.0017],
    [15.4, -25.9, 0.18, 0.98, 0.59, -0.03, 0.0020],
]


def advance(bodies, steps, dt=0.01):
    for _ in range(steps):
        for i, a in enumerate(bodies):
            for b in bodies[i + 1:]:
                dx, dy, dz = a[0] - b[0], a[1] - b[1], a[2] - b[2]
                d2 = dx * dx + dy * dy + dz * dz
                mag = dt / (d2 * math.sqrt(d2))
                a[3] -= dx * b[6] * mag
                a[4] -= dy * b[6] * mag
                a[5] -= dz * b[6] * mag
                b[3] += dx * a[6] * mag
                b[4] += dy * a[6] * mag
                b[5] += dz * a[6] * mag
        for body in bodies:
            for k in range(3):
                body[k] += dt * body[k + 3]
    return sum(b[0] for b in bodies)


def words(count):
    seen = {}
    state = 1
    for _ in range(count):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        key = "word%d" % (state % (count // 4))
        seen[key] = seen.get(key, 0) + 1
    ranked = sorted(seen.items(), key=lambda kv: (-kv[1], kv[0]))
    return ranked[0], len(ranked)


print(advance(BODIES, int(sys.argv[1])), words(int(sys.argv[2])))
