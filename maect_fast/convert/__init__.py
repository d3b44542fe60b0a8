"""Other people's encoders in and out; what is read is in `formats.py`.

`maect_fast.convert.export` and `.inspect` are imported where they are used.
"""

from maect_fast.convert.find import ConvertError, FoundEncoder, find_encoder
from maect_fast.convert.load import check_fit, check_possible, export_timm, load_encoder

__all__ = [
    "ConvertError",
    "FoundEncoder",
    "check_fit",
    "check_possible",
    "export_timm",
    "find_encoder",
    "load_encoder",
]
