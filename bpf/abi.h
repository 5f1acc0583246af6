/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Everything that the BPF programs, the native channel and Python share: limits, flags, map keys and values.
 * The BPF C and the channel include it; cffi_build.py feeds it to cffi, so it holds declarations only, and
 * tests/t0_abi compares each size and offset with the BTF of the built object.
 *
 * Sizes are in bytes and times in nanoseconds unless the name says otherwise. Fields are ordered so that there is
 * no padding that is not named: map keys are compared byte by byte.
 */
#ifndef BPFUSE_ABI_H
#define BPFUSE_ABI_H

enum bpfuse_limit {
	BPFUSE_PAGE = 4096,
	BPFUSE_NAME_MAX = 255,
	BPFUSE_MAX_WRITE = 262144,   /* the largest WRITE, READ or READDIR the kernel is told to send */
	BPFUSE_PAYLOAD = 266240,     /* BPFUSE_MAX_WRITE and one page: names travel in front of data */
	BPFUSE_MAX_DATA = 65536,     /* the largest file whose bytes lie in `pages` */
	BPFUSE_BUSY_ENTRIES = 16384, /* in `busiest` */
	BPFUSE_RECENT_SLOTS = 65536, /* slots in `recent`; a power of two */
	BPFUSE_XATTRS = 8,           /* xattrs that an inode in `xattrs` has at most, */
	BPFUSE_XATTR_BYTES = 512,    /* and the bytes of their names and values */
	BPFUSE_XATTR_SHARE = 64,     /* `xattrs` has room for as many inodes as `inodes`, divided by this */
	BPFUSE_USE_SHIFT = 26,       /* about 67 ms */
	BPFUSE_GROUP_SHARE = 2,      /* `uses` has room for as many groups as `inodes`, divided by this, and two */
	BPFUSE_OPEN_SLOTS = 65536,   /* slots in `opens`; a power of two */
	BPFUSE_OPCODES = 64,         /* FUSE opcodes below this have counters of their own */
	BPFUSE_OUTCOMES = 16,
};

/* Handles (fh). The worker's own handles have BPFUSE_FH_KERNEL clear. */
enum bpfuse_fh_bit {
	BPFUSE_FH_KERNEL_BIT = 63,   /* given out by the BPF program; the low 48 bits are the inode */
	BPFUSE_FH_SERIAL_SHIFT = 48, /* the 15 bits from here tell handles of one inode apart; */
	BPFUSE_FH_VERSION_BITS = 8,  /* of a directory these of them are its version, and so that of its listing */
	BPFUSE_FH_APPENDS_BIT = 55,  /* of a worker's handle: set by the channel in a WRITE to the end of the file */
};

/*
 * What the worker grants of a file that is open for writing, in the last word of its reply to CREATE, OPEN (unless that
 * names a backing) and WRITE. How many bytes it takes without a word, and above them up to which size it takes the
 * file's closing so; in units. CREATE's says, too, whether it takes changes of attributes. The kernel sees 0 there.
 */
enum bpfuse_grant {
	BPFUSE_GRANT_UNIT = 1024,
	BPFUSE_GRANT_MOST = 0x7fff,    /* of either */
	BPFUSE_GRANT_CLOSE_SHIFT = 16, /* the size lies above the bytes */
	BPFUSE_GRANT_CHANGES_BIT = 31,
};

/* By a reply to nobody the worker says, too, how much it has taken of what was posted: so much more may be. */
enum bpfuse_renewal { BPFUSE_RENEW_UNIQUE = 6 };

struct bpfuse_renewed {
	__u64 handle;
	__u32 units;
	__u32 reserved;
};

/*
 * The worker takes grants back by a reply to nobody: of this unique, its body an inode (__u64; 0: all). The channel says that it
 * has, by a request of this opcode (and nobody's, either) and this inode; what was posted lies before it on the socket.
 */
enum bpfuse_withdrawal {
	BPFUSE_WITHDRAW_UNIQUE = 4,
	BPFUSE_WITHDRAWN_OPCODE = 8192,
};

/* control.profile */
enum bpfuse_profile {
	BPFUSE_PROFILE_GENERAL = 0,
	BPFUSE_PROFILE_DATASET = 1, /* nothing is opened: OPEN, OPENDIR and FLUSH are ENOSYS, and handles are 0 */
};

enum bpfuse_inode_flag {
	BPFUSE_INODE_NO_XATTRS = 1,    /* GETXATTR is ENODATA, LISTXATTR is empty */
	BPFUSE_INODE_HAS_DATA = 2,     /* the whole content (or symlink target, or listing) lies in `pages` */
	BPFUSE_INODE_WORKER_OPENS = 4, /* the worker decides how it is opened: cached or with passthrough */
};

/* Why a request was answered or was not. One counter for each opcode and outcome. */
enum bpfuse_outcome {
	BPFUSE_ANSWERED = 0,
	BPFUSE_ANSWERED_ABSENT = 1, /* LOOKUP of a name known to be absent, GETXATTR of an inode without xattrs */
	BPFUSE_MISS_OPCODE = 2,     /* never answered in the kernel */
	BPFUSE_MISS_DEADLINE = 3,   /* the session's lease has run out */
	BPFUSE_MISS_EPOCH = 4,      /* the value is of an earlier epoch */
	BPFUSE_MISS_NAME = 5,       /* (parent, name) is not in `names` */
	BPFUSE_MISS_INODE = 6,      /* the inode is not in `inodes` */
	BPFUSE_MISS_DATA = 7,       /* the inode's bytes or listing are not in `pages`; STATFS: no valid figures */
	BPFUSE_MISS_RACE = 8,       /* the value changed while it was read */
	BPFUSE_MISS_FLAGS = 9,      /* open flags, or a type of inode, that the worker must see */
	BPFUSE_MISS_HANDLE = 10,    /* the handle was given out by the worker; READDIR: for another listing */
	BPFUSE_MISS_XATTRS = 11,    /* the inode has, or may have, xattrs, and they are not in `xattrs` */
	BPFUSE_MISS_RANGE = 12,     /* an offset or size the program does not serve */
	BPFUSE_MISS_MALFORMED = 13, /* the request is not what its opcode demands */
	BPFUSE_MISS_HELPER = 14,    /* a BPF helper failed */
	BPFUSE_ANSWERED_PASSTHROUGH = 15, /* OPEN of a file that the kernel reads from its backing by itself */
};

/*
 * Entries lie in the maps in groups, which the worker gives up together: a directory's, or some of a large one's. `uses`,
 * an mmapable array of __u64 by the number of the group, says when one of them was last asked for: CLOCK_BOOTTIME, shifted
 * right by BPFUSE_USE_SHIFT.
 */

/*
 * `names`: hash. A key with a hash of 0 is no name's: it marks a directory as whole, which means that each name that it has is
 * here, and so that those which are not are absent. The mark goes before any of the directory's names does.
 */
struct bpfuse_name_key {
	__u64 parent;
	__u64 hash[2]; /* SipHash-2-4-128 of the name under control.hash_key */
};

struct bpfuse_name_value {
	__u64 ino; /* 0: known to be absent; of a mark, nothing */
	__u32 epoch;
	__u32 group;
	__u64 version; /* last, see bpfuse_inode_value */
};

/*
 * `inodes`: hash, key __u64 ino. A value is never changed in place, and `version` differs for every value ever
 * put: an element can be given to another key while a program reads it, so a reader takes the version first,
 * copies, looks the key up again and compares. It stands last because the kernel copies values upwards.
 */
struct bpfuse_inode_value {
	__u64 size;
	__u64 stored;              /* bytes of content, holes left out */
	__s64 atime, mtime, ctime; /* seconds */
	__u32 atimensec, mtimensec, ctimensec;
	__u32 mode, nlink, uid, gid;
	__u32 device;     /* that a special file stands for; of a regular file the backing that it is opened for reading
			     with, in passthrough, or 0 */
	__u32 flags;      /* enum bpfuse_inode_flag */
	__u32 first_page; /* extent in `pages`; with BPFUSE_INODE_HAS_DATA only */
	__u32 data_bytes;
	__u32 group;
	__u32 epoch;
	__u32 file_version; /* the low bits of the inode's own version: it rises with each change of the inode */
	__u64 version;
};

/* One xattr: its value is `size` bytes from `offset` on in the `bytes` of its inode's. */
struct bpfuse_xattr {
	__u64 hash[2]; /* of the name, as in bpfuse_name_key */
	__u32 offset, size;
};

enum bpfuse_xattr_mark {
	BPFUSE_XATTRS_UNLISTED = 0x7fffffff, /* list_bytes: who asks must be known to list them */
};

/*
 * `xattrs`: LRU hash, key __u64 ino: all xattrs of an inode, for those that have some, few and small ones. Read by the
 * rule of bpfuse_inode_value, and dropped with the inode.
 */
struct bpfuse_xattrs_value {
	struct bpfuse_xattr entries[8]; /* BPFUSE_XATTRS */
	__u8 bytes[512];                /* BPFUSE_XATTR_BYTES: the names, each with its NUL, then the values */
	__u32 count;
	__u32 list_bytes; /* of the names */
	__u32 epoch;
	__u32 reserved;
	__u64 version; /* last */
};

/* `pages`: mmapable array of these. */
struct bpfuse_page {
	__u8 bytes[4096];
};

/*
 * The listing of a directory, an extent in `pages` of data_bytes: the head, `count` + 1 words that say where in the
 * extent each entry begins and the last one ends, and, on an 8 byte boundary, the entries as struct fuse_dirent, in
 * the order of `off`. "." and ".." are the first two.
 */
struct bpfuse_listing {
	__u32 count;
	__u32 starts[1]; /* count + 1 of them */
};

/* What STATFS answers, guarded by `seq`: odd while the worker writes. */
struct bpfuse_statfs {
	__u32 seq;
	__u32 bsize, frsize, namelen;
	__u64 blocks, bfree, bavail, files, ffree;
	__u64 valid_until; /* CLOCK_BOOTTIME; 0: not known */
};

/* `control`: mmapable array of one. Single words are written whole; the worker is their only writer after start. */
struct bpfuse_control {
	__u64 deadline;       /* CLOCK_BOOTTIME; at and after it nothing is answered */
	__u64 kernel_ttl_max; /* the longest TTL ever put in a reply */
	__u64 hash_key[2];
	__u32 epoch;
	__u32 owner_tgid; /* the channel; set by the adopt program */
	__u32 profile;
	__u32 entries; /* how many ring entries there are */
	struct bpfuse_statfs statfs;
	__u32 page_cursor;   /* where in `pages` the next extent goes; a later worker goes on there */
	__u32 pages_used;    /* pages that have been written at least once */
	__u64 names_changes; /* odd while `names` is changed: what is not found then may be there all the same */
};

/* The kernel's fuse_uring_req_header (uapi since Linux 6.14; Debian 12's headers are older). */
struct bpfuse_uring_header {
	__u8 in_out[128]; /* fuse_in_header in, fuse_out_header out */
	__u8 op_in[128];
	__u64 flags;
	__u64 commit_id;
	__u32 payload_size;
	__u32 padding;
	__u64 reserved;
};

/* `entries`: mmapable array, one a ring entry, at index queue * depth + slot. */
struct bpfuse_entry {
	struct bpfuse_uring_header uring; /* 288 bytes */
	__u32 answered;                   /* 1: the program has put a finished reply in place */
	__u32 outcome;                    /* of the last run, for the tests */
	__u8 reserved[3800];
	__u8 payload[266240]; /* BPFUSE_PAYLOAD */
};

/* `recent`: array of __u64, the uniques of requests answered in the kernel lately, at unique / 2 & (slots - 1): what
   `bpfuse trace` tells them by. */
/* `watched`: array of one __u64, CLOCK_BOOTTIME: until then requests are counted in `busiest`, an LRU hash. */
enum bpfuse_busy_kind {
	BPFUSE_BUSY_INODE = 1,   /* of the node that a request names: of a directory for what concerns a name in it */
	BPFUSE_BUSY_PROCESS = 2, /* of the process that made it; 0: the kernel itself */
};

struct bpfuse_busy_key {
	__u64 id;
	__u32 kind;
	__u32 reserved;
};

struct bpfuse_busy {
	__u64 requests;
	__u64 answered; /* in the kernel */
};

/* `counters`: per-CPU array, index opcode * BPFUSE_OUTCOMES + outcome, value __u64. */
/* `opens`: mmapable array of BPFUSE_OPEN_SLOTS of these, by a hash of the inode. */
struct bpfuse_open_slot {
	__u32 handles; /* given out and not yet released */
	__u32 locks;   /* inodes that programs of this mount have locked: their FLUSH and RELEASE are the worker's */
	__u32 serial;  /* of the next handle that BPF gives out */
	__u32 reserved;
};

/* user_data of the channel's ring requests: magic in the high 32 bits, entry index in the low. */
enum bpfuse_magic {
	BPFUSE_MAGIC_FUSE = 0x62704655, /* a FUSE request in an entry */
	BPFUSE_MAGIC_WAKE = 0x62705741, /* a message from the bridge: the entry's reply is ready */
};

/* Context of the `syscall` programs. */
struct bpfuse_test_args {
	__u32 entry;
	__u32 reserved;
};

struct bpfuse_map_counts {
	__s64 names, inodes;
};

#endif
