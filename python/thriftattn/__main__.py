"""The program `thriftattn`, as `python -m thriftattn` and as the command that pip installs."""

import os
import sys
from pathlib import Path


def main() -> None:
    program = Path(__file__).parent / "bin" / "thriftattn"
    if not program.exists():
        sys.exit("thriftattn: this package was built without the program (THRIFTATTN_MODEL=OFF)")
    os.execv(program, ["thriftattn", *sys.argv[1:]])


if __name__ == "__main__":
    main()
