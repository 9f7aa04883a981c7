/** A Java program whose native part has a registration cache. The virtual machine loads it locally. */
public class Cache {
    static native int stale();

    public static void main(String[] words) {
        System.load(words[0]);
        byte[][] garbage = new byte[64][];
        for (int i = 0; i < 1000; i++)
            garbage[i % 64] = new byte[1 << 16];
        System.gc();
        System.out.println(stale() + " stale of all, " + garbage.length);
    }
}
