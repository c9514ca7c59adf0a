import logging

logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)  # misses torchvision, used by nothing here
