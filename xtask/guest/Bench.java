import java.util.Arrays;
import java.util.HashMap;
import java.util.Map;

/** Numbers, objects, interfaces and strings: Bench ROUNDS. */
public final class Bench {
    interface Shape {
        double area();
    }

    record Circle(double r) implements Shape {
        public double area() {
            return Math.PI * r * r;
        }
    }

    record Box(double a, double b) implements Shape {
        public double area() {
            return a * b;
        }
    }

    static int sieve(int n) {
        boolean[] composite = new boolean[n + 1];
        int count = 0;
        for (int i = 2; i <= n; i++) {
            if (composite[i]) continue;
            count++;
            for (long j = (long) i * i; j <= n; j += i) composite[(int) j] = true;
        }
        return count;
    }

    static double shapes(int n) {
        double sum = 0;
        for (int i = 0; i < n; i++) {
            Shape s = i % 3 == 0 ? new Circle(i) : new Box(i, 2);
            sum += s.area();
        }
        return sum;
    }

    static int words(int n) {
        Map<String, Integer> seen = new HashMap<>();
        for (int i = 0; i < n; i++) seen.merge("k" + i * 7919 % 1000, 1, Integer::sum);
        return seen.size();
    }

    public static void main(String[] args) {
        double total = 0;
        for (int r = Integer.parseInt(args[0]); r > 0; r--) {
            int[] numbers = new int[50000];
            for (int i = 0; i < numbers.length; i++) numbers[i] = i * 7919 % 50021;
            Arrays.sort(numbers);
            total += sieve(200000) + shapes(300000) + words(50000) + numbers[77];
        }
        System.out.println(total);
    }
}
