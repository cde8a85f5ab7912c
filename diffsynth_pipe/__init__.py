"""Cache-then-train pipeline for diffusion transformers."""

import logging

# diffusers and peft import it wherever it is installed; it then warns of a faster kernel that is not, used or not.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
