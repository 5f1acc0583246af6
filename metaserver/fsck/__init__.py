"""Checking and repairing what a volume's engine holds. The engine is to be this program's alone meanwhile.

A round reads everything once, in one snapshot: rows of all kinds run side by side in the order of the inode numbers
that begin their keys, and what refers across that order (entries to inodes, chunks to slices) is sorted beside, on
disk. So memory stays small however large the volume is.

What a round finds is repaired after it, each finding by a small transaction that looks again before it changes
anything. A repair may bring up something else, such as a count that is wrong now; so rounds follow each other until
one finds nothing. What was repaired stays so, wherever it is broken off.

scan.py finds what is wrong with names and inodes, content.py with what files hold, slices.py with slices and counters,
history.py with the log of events, losses.py what the loss of objects means; repairs.py has the repairs, run.py the
rounds. Repairs are told in the log as one event, which says that anything may have changed.
"""
