"""What weights may be stored in, for option parsers, which need no torch to name it."""

from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16"]
