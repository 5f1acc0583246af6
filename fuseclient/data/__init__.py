"""File content: gathering of writes, reads over slices, and the objects that hold the bytes of large files."""
