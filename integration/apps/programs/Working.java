import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.lang.management.GarbageCollectorMXBean;
import java.lang.management.ManagementFactory;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.util.ArrayList;
import java.util.List;
import java.util.Random;
import java.util.SplittableRandom;
import java.util.TreeMap;
import java.util.concurrent.Executors;
import java.util.concurrent.SynchronousQueue;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;
import java.util.concurrent.locks.ReentrantLock;

/**
 * Threads that allocate, compute, hand over and wait, and a server; they check themselves.
 *
 * <p>Usage: java Working.java, with commands on stdin, one line on stdout for each.
 *
 * <pre>
 *   3 threads   replace one entry after another of a map, whose bytes follow from key and age:
 *               all that they drop is garbage, so that the collector never rests
 *   1 thread    computes a recurrence, whose end has a closed form
 *   2 threads   hand numbers to each other, without a gap
 *   1 timer     a beat of 5 ms, by a clock that must not go back
 *   1 thread    a server (selector) that answers each byte with the next one
 *
 *   check       verify all; "ok GARBAGE STEPS...", GARBAGE being the number of collections
 *   quit        end with status 0
 * </pre>
 */
public final class Working {
    /** Something that is done again and again; {@code fault} tells what is wrong with it, or null. */
    private abstract static class Work extends Thread {
        final ReentrantLock lock = new ReentrantLock(true);
        final AtomicLong steps = new AtomicLong();

        Work(String name) {
            super(name);
            setDaemon(true);
        }

        abstract void step() throws Exception;

        abstract String fault();

        @Override
        public void run() {
            try {
                while (true) {
                    lock.lock();
                    try {
                        step();
                        steps.incrementAndGet();
                    } finally {
                        lock.unlock();
                    }
                }
            } catch (Exception end) {
                end.printStackTrace();
                System.exit(2);
            }
        }
    }

    private static final class Churn extends Work {
        private static final int ENTRIES = 1500;
        private final TreeMap<Long, byte[]> entries = new TreeMap<>();
        private final Random random;
        private long next;

        Churn(int seed) {
            super("churn " + seed);
            random = new Random(seed);
            while (next < ENTRIES) {
                add();
            }
        }

        private void add() {
            byte[] bytes = new byte[(int) (64 + (next * 7919) % 4096)];
            new SplittableRandom(next).nextBytes(bytes);
            entries.put(next++, bytes);
        }

        private static boolean isRight(long key, byte[] bytes) {
            byte[] wanted = new byte[(int) (64 + (key * 7919) % 4096)];
            new SplittableRandom(key).nextBytes(wanted);
            return java.util.Arrays.equals(wanted, bytes);
        }

        @Override
        void step() {
            Long key = entries.ceilingKey(entries.firstKey() + random.nextInt(ENTRIES / 2));
            if (!isRight(key, entries.remove(key))) {
                throw new IllegalStateException(getName() + ": " + key);
            }
            add();
        }

        @Override
        String fault() {
            boolean right = entries.size() == ENTRIES && next == ENTRIES + steps.get();
            for (var entry : entries.entrySet()) {
                right &= isRight(entry.getKey(), entry.getValue());
            }
            return right ? null : getName();
        }
    }

    private static final class Recurrence extends Work {
        private static final long FACTOR = 6364136223846793005L;
        private static final int ROUND = 100_000;
        private long value = 1;
        private double sum;

        Recurrence() {
            super("recurrence");
        }

        @Override
        void step() {
            double added = 0;
            for (int i = 0; i < ROUND; i++) {
                value *= FACTOR;
                added += 0.5;
            }
            sum += added;
        }

        @Override
        String fault() {
            long power = 1;
            long square = FACTOR;
            for (long left = steps.get() * ROUND; left > 0; left >>= 1) {
                power *= (left & 1) == 1 ? square : 1;
                square *= square;
            }
            return power == value && sum == steps.get() * (ROUND / 2.0) ? null : getName();
        }
    }

    private static final class Handing extends Work {
        private final SynchronousQueue<Long> queue;
        private final boolean gives;
        private boolean gap;

        Handing(SynchronousQueue<Long> queue, boolean gives) {
            super(gives ? "gives" : "takes");
            this.queue = queue;
            this.gives = gives;
        }

        @Override
        void step() throws InterruptedException {
            if (gives) {
                // Who checks one of the two must not wait for the other, which he holds.
                while (!queue.offer(steps.get(), 1, TimeUnit.MILLISECONDS)) {
                    lock.unlock();
                    lock.lock();
                }
                return;
            }
            Long got;
            while ((got = queue.poll(1, TimeUnit.MILLISECONDS)) == null) {
                lock.unlock();
                lock.lock();
            }
            gap |= got != steps.get();
        }

        @Override
        String fault() {
            return gap ? getName() : null;
        }
    }

    private static final class Beat implements Runnable {
        final AtomicLong beats = new AtomicLong();
        private volatile boolean back;
        private long last = System.nanoTime();

        @Override
        public void run() {
            long now = System.nanoTime();
            back |= now < last;
            last = now;
            beats.incrementAndGet();
        }

        String fault() {
            return back ? "beat" : null;
        }
    }

    private static final class Server extends Thread {
        private final Selector selector = Selector.open();
        private final ServerSocketChannel listener = ServerSocketChannel.open();

        Server() throws IOException {
            super("server");
            setDaemon(true);
            listener.bind(new InetSocketAddress(InetAddress.getByName("127.0.0.1"), 0));
            listener.configureBlocking(false);
            listener.register(selector, SelectionKey.OP_ACCEPT);
        }

        int port() {
            return listener.socket().getLocalPort();
        }

        @Override
        public void run() {
            try {
                while (true) {
                    selector.select();
                    for (SelectionKey key : selector.selectedKeys()) {
                        serve(key);
                    }
                    selector.selectedKeys().clear();
                }
            } catch (IOException end) {
                end.printStackTrace();
                System.exit(2);
            }
        }

        private void serve(SelectionKey key) throws IOException {
            if (key.isAcceptable()) {
                SocketChannel client = listener.accept();
                client.configureBlocking(false);
                client.register(selector, SelectionKey.OP_READ);
                return;
            }
            SocketChannel client = (SocketChannel) key.channel();
            ByteBuffer bytes = ByteBuffer.allocateDirect(4096);
            if (!read(client, bytes)) {
                client.close();
                return;
            }
            for (int i = 0; i < bytes.position(); i++) {
                bytes.put(i, (byte) (bytes.get(i) + 1));
            }
            bytes.flip();
            while (bytes.hasRemaining()) {
                client.write(bytes);
            }
        }
    }

    /** Returns false at the end, and when the other side is gone without a word. */
    private static boolean read(SocketChannel client, ByteBuffer bytes) {
        try {
            return client.read(bytes) >= 0;
        } catch (IOException gone) {
            return false;
        }
    }

    private static String check(List<Work> works, Beat beat) {
        StringBuilder steps = new StringBuilder();
        String fault = beat.fault();
        for (Work work : works) {
            work.lock.lock();
            try {
                steps.append(' ').append(work.steps.get());
                fault = fault == null ? work.fault() : fault;
            } finally {
                work.lock.unlock();
            }
        }
        long garbage = 0;
        for (GarbageCollectorMXBean bean : ManagementFactory.getGarbageCollectorMXBeans()) {
            garbage += bean.getCollectionCount();
        }
        return (fault == null ? "ok " : "wrong: " + fault + " ")
                + garbage + " " + beat.beats.get() + steps;
    }

    public static void main(String[] arguments) throws Exception {
        List<Work> works = new ArrayList<>();
        for (int seed = 1; seed <= 3; seed++) {
            works.add(new Churn(seed));
        }
        works.add(new Recurrence());
        SynchronousQueue<Long> queue = new SynchronousQueue<>();
        works.add(new Handing(queue, true));
        works.add(new Handing(queue, false));
        Beat beat = new Beat();
        works.forEach(Thread::start);
        Executors.newScheduledThreadPool(1, Working::daemon)
                .scheduleAtFixedRate(beat, 0, 5, TimeUnit.MILLISECONDS);
        Server server = new Server();
        server.start();
        System.out.println("ready " + server.port());
        BufferedReader commands = new BufferedReader(new InputStreamReader(System.in));
        for (String line; (line = commands.readLine()) != null; ) {
            if (line.equals("quit")) {
                System.exit(0);
            }
            System.out.println(line.equals("check") ? check(works, beat) : "?");
        }
        System.exit(1);
    }

    private static Thread daemon(Runnable work) {
        Thread thread = new Thread(work, "beat");
        thread.setDaemon(true);
        return thread;
    }
}
