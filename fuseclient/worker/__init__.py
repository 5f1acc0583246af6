"""The worker: the policy of a mount. It answers what the kernel could not, and feeds the kernel's maps."""
