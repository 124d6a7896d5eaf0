"""Push an adapter to the Hub with the card that tells how to load it.

`PeftModel.push_to_hub` works too, but transformers writes its blank card over PEFT's in a new repository, for every
PEFT method; who finds the adapter then does not learn that it needs `import bem_peft`.
"""

from __future__ import annotations

import tempfile

from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel


def push_to_hub(
    model: PeftModel,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
) -> CommitInfo:
    """Create `repository` ("user/name") if it is not there, and push what `save_pretrained` writes.

    Raises:
        TypeError: `model` is no PeftModel.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused; nothing is committed.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"push_to_hub takes a PeftModel, not {type(model).__name__}.")
    api = HfApi(token=token)
    name = api.create_repo(repository, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        pushed: CommitInfo = api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return pushed
