"""Run the Python of each folder's README.md in that folder, in a process that has no prudent; print what it prints."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import transformers

assert "prudent" not in sys.modules
sys.modules["prudent"] = None  # from here on, `import prudent` raises
transformers.utils.logging.disable_progress_bar()
printed = []
for folder in sys.argv[1:]:
    os.chdir(folder)
    code = re.search(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code[1], {})
    printed.append(said.getvalue())
print(json.dumps(printed))
