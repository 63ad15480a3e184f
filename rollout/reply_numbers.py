"""What the numbers of an engine's reply may be: those that fit no array are refused as they are
read, with their place in the reply.
"""

from typing import Annotated

import msgspec
import numpy as np

TokenId = Annotated[int, msgspec.Meta(ge=0, le=int(np.iinfo(np.int32).max))]
Logprob = Annotated[float, msgspec.Meta(ge=float(np.finfo(np.float32).min))]
"""Still finite in float32; whether it is <= 0, its reader looks."""
