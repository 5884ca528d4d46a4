"""What torch.save writes, looked at before PyTorch reads it: a zip archive of one pickle and the tensors' bytes.

`torch.load(weights_only=True)` runs no code of a file, but it unpacks what is compressed to whatever size it has, and
calls constructors that take as much memory as they are told. Both are refused here, by what the file says of itself.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from pathlib import Path

from rsd_trt.errors import UserError, named

PICKLE = "data.pkl"
PROTOCOL = 2  # what torch.save writes, and its reader knows
MAX_PICKLE = 32 << 20  # bytes; those of a state dict have kilobytes
# What a state dict is built from, and the plain values beside it: none of it takes more memory than the file has bytes.
PLAIN = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|parameter)|torch (bfloat|float|int|uint|bool|complex)\d*|"
    r"torch (BFloat16|Half|Float|Double|ComplexFloat|ComplexDouble|Long|Int|Short|Char|Byte|Bool)Storage|"
    r"torch (Size|device)|collections (OrderedDict|Counter)|_codecs encode|(__builtin__|builtins) (set|complex)"
)


def check_archive(file: Path) -> None:
    """Looks at the names and sizes of the archive's records, and at what its pickle would call.

    Raises:
        UserError: records that are compressed, overlap or are too large.
        pickle.UnpicklingError: the pickle is built from something else than ordinary tensors and plain values.
        Exception: nearly anything, if the file is damaged.
    """
    size = file.stat().st_size
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise UserError(f"{file} is compressed ({named(record.filename)}), which torch.save does not do")
        if (declared := sum(record.file_size for record in records)) > size:
            raise UserError(f"{file} has {size} bytes and claims to hold {declared}: its records overlap")
        pickles = [record for record in records if record.filename.lower().endswith(f"/{PICKLE}")]
        if len(pickles) != 1:
            raise UserError(f"{file} holds {len(pickles)} files named {PICKLE}, torch.save writes one")
        if pickles[0].file_size > MAX_PICKLE:
            raise UserError(f"{file}: its {PICKLE} has {pickles[0].file_size} bytes, at most {MAX_PICKLE} are read")
        content = archive.read(pickles[0])
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "PROTO" and argument != PROTOCOL:
            raise UserError(f"{file} is of pickle protocol {argument}, torch.save writes {PROTOCOL}")
        if opcode.name == "GLOBAL" and not PLAIN.fullmatch(str(argument)):
            raise pickle.UnpicklingError(f"GLOBAL {str(argument).replace(' ', '.')}")
