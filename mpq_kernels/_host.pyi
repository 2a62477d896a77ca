import numpy as np
from numpy.typing import NDArray

LAYOUT_ID: str

def pack_codes(codes: NDArray[np.uint8], bits: int, threads: int) -> NDArray[np.int32]: ...
def unpack_codes(packed: NDArray[np.int32], bits: int, n: int, k: int, threads: int) -> NDArray[np.uint8]: ...
