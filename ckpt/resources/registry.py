"""All resources that are known, in the order in which they are captured and restored.

Within one stage (`base.Stage`) the order is that of these lists: so what relies on something else
of its stage stands behind it. The engine walks them and knows no resource by name.
"""

from typing import Any

from ckpt.resources.base import Resource
from ckpt.resources.memory import MEMORY
from ckpt.resources.registers import REGISTERS

PROCESS: tuple[Resource[Any], ...] = (MEMORY,)
"""What the threads of a process share; captured and restored on the leader."""

THREAD: tuple[Resource[Any], ...] = (
    # The last of all: the thread then is what it was, and only waits to be let go.
    REGISTERS,
)
"""What each thread has for itself."""
