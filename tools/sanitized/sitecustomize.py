"""Makes Python load storax's extension from $STORAX_EXTENSION, a build of it with sanitizers.

Python runs this when it starts, in pytest's workers too, if this folder is in PYTHONPATH. An editable
install, which has a finder of its own, would otherwise come first.
"""

import importlib.util
import os
import sys


class Sanitized:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "storax._core":
            return importlib.util.spec_from_file_location(name, os.environ["STORAX_EXTENSION"])
        return None


sys.meta_path.insert(0, Sanitized)
