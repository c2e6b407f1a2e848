"""Width of a row of packed codes. It imports no torch, because plans count the bytes of exports."""


def packed_width(in_features: int, bits: int) -> int:
    """Return the words per row of ``pack_bits``, ceil(in_features * bits / 32); ValueError for a width outside 2..8."""
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits} cannot be packed; use 2 to 8")
    return -(-in_features * bits // 32)
