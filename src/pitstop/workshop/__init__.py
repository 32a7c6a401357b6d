"""Where adapters are made: recipe to adapter, checked, exported, compared with what was trained, and packed."""

import logging
import os

# pitstop shows progress and problems in its own words; what these libraries say at import would stand between them.
# It must be said before they are imported.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
