"""``python -m fuseclient.cli``: the command ``bpfuse`` where it is not installed."""

from fuseclient.cli import run

run()
