"""Says plainly what this Python lacks for building storax."""

import importlib.util
import os
import sys
import sysconfig

VERSION = sys.version_info[:2]

if VERSION < (3, 11):
    problem = f"it is Python {VERSION[0]}.{VERSION[1]}, and storax needs 3.11 or newer"
elif not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    problem = "it comes without Python.h (on Debian and Ubuntu: install python3-dev)"
elif not (importlib.util.find_spec("ensurepip") and importlib.util.find_spec("venv")):
    problem = "it can't make virtual environments (on Debian and Ubuntu: install python3-venv)"
else:
    sys.exit(0)

sys.exit(
    f"{sys.executable} won't do: {problem}.\n"
    "Name another interpreter, as in `make test PYTHON=/path/to/python3.12`."
)
