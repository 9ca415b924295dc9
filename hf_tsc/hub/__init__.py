"""Suspect means hostile: models from the Hub without running or trusting anything of theirs, and back to it.

Always in this order: pin one commit, fetch only the files that are read, compare their checksums with the Hub's,
refuse every declaration that makes `transformers` read something else, load float32 weights from the folder.
"""

from hf_tsc.hub.folder import check_folder, declared_license
from hf_tsc.hub.loading import load_image_processor, load_model, load_tokenizer, offline, quiet
from hf_tsc.hub.push import Pushed, PushOptions, check_push, push_folder
from hf_tsc.hub.source import Listing, Source, is_folder, list_repo, resolve_model

__all__ = [
    "Listing",
    "PushOptions",
    "Pushed",
    "Source",
    "check_folder",
    "check_push",
    "declared_license",
    "is_folder",
    "list_repo",
    "load_image_processor",
    "load_model",
    "load_tokenizer",
    "offline",
    "push_folder",
    "quiet",
    "resolve_model",
]
