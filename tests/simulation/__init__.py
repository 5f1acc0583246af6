"""A seeded simulation of several clients and a metaserver in one process: the real protocol code, all else a model.

The event loop has virtual time and knows which *node* (a process that can be stopped, killed or suspended) each
callback belongs to. The network, the engine's durability, the object store, each client's kernel and its BPF maps are
models. What the clients' programs saw is a history; the order of commits in the engine is the witness that the history
is checked against. Everything follows from one seed.
"""
