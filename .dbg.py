import os, sys

sys.path.insert(0, "tests")
import rig, several_mounts

sandbox = rig.Sandbox()
try:
    with several_mounts.cluster(sandbox, 30.0) as cluster:
        a, b = cluster.pair(sys.argv[1])
        one, two = a.path / "f", b.path / "f"
        size = 200000
        one.write_bytes(b"0" * size)
        for _ in range(3):
            two.stat()
            two.read_bytes()
        w = os.open(one, os.O_RDWR)
        r = os.open(two, os.O_RDONLY)
        for n in range(1, 3):
            os.pwrite(w, b"%d" % n * size, 0)
            os.fsync(w)
            assert os.pread(r, size + 1, 0) == b"%d" % n * size
            assert two.read_bytes() == b"%d" % n * size
        os.ftruncate(w, 10)
        print("fstat", os.fstat(r).st_size, "stat", two.stat().st_size, "fstat w", os.fstat(w).st_size)
        print("pread", len(os.pread(r, size + 1, 0)))
        f = os.open(two, os.O_RDONLY)
        print("after open fstat", os.fstat(f).st_size)
        d = os.read(f, 300000)
        print("read", len(d), d[:12], d[10:] == bytes(len(d) - 10))
        print("fstat", os.fstat(r).st_size)
        d = os.read(f, 300000)
        print("read", len(d))
        os.close(f)
        os.close(w)
        os.close(r)
    print((sandbox.path / "b.log").read_text()[-3500:])
finally:
    sandbox.close()
