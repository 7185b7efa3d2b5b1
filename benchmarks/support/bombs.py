"""Files that take a long time or much memory to decode."""

import io

from PIL import Image


def many_scans(side: int, n_scans: int) -> bytes:
    """Return a progressive JPEG of one gray value that repeats its last scan: small, and slow to decode."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 128).save(buffer, "JPEG", progressive=True)
    file = buffer.getvalue()
    start, end = file.rindex(b"\xff\xc4"), file.rindex(b"\xff\xd9")  # its tables and its scan
    return file[:start] + file[start:end] * n_scans + file[end:]
