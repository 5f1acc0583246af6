"""The extension module that cffi_build.py makes. The modules that import it give it types."""

from typing import Any

ffi: Any
lib: Any
