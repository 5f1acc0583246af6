"""The metaserver: a volume's namespace as transactions on an ordered key-value engine, served to bpfuse clients.

It knows nothing of FUSE: the only module that a client imports from here is :mod:`metaserver.wire`.
"""
