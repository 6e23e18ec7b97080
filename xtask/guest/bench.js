// Numbers, objects, closures and strings: bench.js ROUNDS
"use strict";
const rounds = Number(process.argv[2]);

function sieve(n) {
  const composite = new Uint8Array(n + 1);
  let count = 0;
  for (let i = 2; i <= n; i++) {
    if (composite[i]) continue;
    count++;
    for (let j = i * i; j <= n; j += i) composite[j] = 1;
  }
  return count;
}

class Vector {
  constructor(x, y, z) { this.x = x; this.y = y; this.z = z; }
  plus(o) { return new Vector(this.x + o.x, this.y + o.y, this.z + o.z); }
  dot(o) { return this.x * o.x + this.y * o.y + this.z * o.z; }
}

function vectors(n) {
  let sum = new Vector(0, 0, 0);
  for (let i = 0; i < n; i++) sum = sum.plus(new Vector(i, i * 0.5, 1 / (i + 1)));
  return sum.dot(sum);
}

function strings(n) {
  const seen = new Map();
  for (let i = 0; i < n; i++) {
    const key = "k" + ((i * 7919) % 1000);
    seen.set(key, (seen.get(key) || 0) + 1);
  }
  return JSON.parse(JSON.stringify([...seen])).length;
}

let total = 0;
for (let r = 0; r < rounds; r++)
  total += sieve(200000) + vectors(200000) + strings(50000) +
    Array.from({ length: 20000 }, (_, i) => (i * 7919) % 20011).sort((a, b) => a - b)[77];
console.log(total);
