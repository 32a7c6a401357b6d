"""What a bundle, a base and an artifact say of themselves.

A bundle is the unit of delivery: one `bundle.json` (the manifest) that lists its artifacts by digest. Its trust comes
from outside (TUF signs the manifest's digest); everything else is bound from here by SHA-256, the base included: an
adapter names the very base file it was trained on, and nothing loads it on another.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from pitstop.errors import RecordError

# merged: a base with an adapter added to its weights; part: a file that the one before names by digest
ArtifactRole = Literal["base", "adapter", "merged", "part"]
BundleKind = Literal["base", "adapter"]

PIECE = 16 << 20  # bytes of a file that are verified, and fetched again, at once

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6}){0,3}")


@dataclass(frozen=True)
class Artifact:
    """One file: the name is for people, the digest is the identity."""

    role: ArtifactRole
    format: str  # "gguf", "onnx"
    precision: str  # "q8_0", "f16" …; empty for a part
    name: str  # file name inside the run or base folder
    sha256: str  # 64 lower-case hex digits
    size: int  # bytes
    pieces: tuple[str, ...] = ()  # SHA-256 of each PIECE of the file, the last one shorter; empty in older manifests


@dataclass(frozen=True)
class Prompting:
    """How text becomes the model's prompt, and where an answer ends."""

    chat_template: str  # jinja2, rendered in a sandbox
    bos_token: str
    eos_token: str
    stop: tuple[str, ...] = ()  # texts that end an answer besides the end-of-generation tokens
    system: str | None = None  # system message the adapter was trained with


@dataclass(frozen=True)
class BaseRef:
    """`base.json`: one base model with everything pitstop made of it."""

    name: str
    architecture: str  # as GGUF names it: "llama", "qwen2" …
    license: str
    source: str  # where the weights came from
    weights_sha256: str  # of the source file
    tokenizer_sha256: str  # of tokenizer.json
    template_sha256: str  # of the chat template's text
    prompting: Prompting
    context_length: int  # tokens
    artifacts: tuple[Artifact, ...] = ()

    def artifact(self, precision: str) -> Artifact:
        """Return the artifact of one precision.

        Raises:
            RecordError: this base has none, with those it has.
        """
        for artifact in self.artifacts:
            if artifact.precision == precision:
                return artifact
        have = ", ".join(artifact.precision for artifact in self.artifacts) or "none"
        raise RecordError([f"base {self.name} has no {precision} artifact (it has: {have})"])


@dataclass(frozen=True)
class Bundle:
    """`bundle.json`: one unit of delivery."""

    kind: BundleKind
    name: str  # also the model name a client asks for
    version: str  # for people; `counter` decides what is newer
    counter: int  # only ever rises for a name; a device refuses a lower one
    license: str
    base_name: str
    base_sha256: str  # the base file this runs on (for a base bundle: its own artifact)
    prompting: Prompting
    context_length: int  # tokens the device may plan for
    artifacts: tuple[Artifact, ...]
    scale: float = 1.0  # multiplier of the adapter at run time
    compatible: tuple[str, ...] = ()  # device profiles; empty: any that can hold it
    measured: dict[str, float] = field(default_factory=dict)  # figure with its unit in the name -> value
    reports: dict[str, str] = field(default_factory=dict)  # report -> sha256 of its JSON

    @property
    def artifact(self) -> Artifact:
        """The one file that runs: of a base the one named, of an adapter the attached or the merged one."""
        if self.kind == "base":
            return next(artifact for artifact in self.artifacts if artifact.sha256 == self.base_sha256)
        return next(artifact for artifact in self.artifacts if artifact.role in ("adapter", "merged"))

    @property
    def parts(self) -> tuple[Artifact, ...]:
        """The files without which that one does not run: an ONNX graph's weights, tokenizer and settings."""
        return tuple(artifact for artifact in self.artifacts if artifact.role == "part")

    @property
    def size(self) -> int:
        """Bytes of what runs, all its files."""
        return sum(artifact.size for artifact in (self.artifact, *self.parts))

    @property
    def merged(self) -> bool:
        """Whether it runs as a model of its own, beside the base it was made from."""
        return self.kind == "adapter" and self.artifact.role == "merged"


def check_bundle(bundle: Bundle, *, where: object = None) -> Bundle:
    """Return the bundle if every name, digest and size in it is well formed.

    Raises:
        RecordError: everything that is not, at once.
    """
    problems = []
    if not _NAME.fullmatch(bundle.name):
        problems.append(f"name: {bundle.name!r} must be a-z, 0-9, '.', '_', '-', at most 64")
    if not _VERSION.fullmatch(bundle.version):
        problems.append(f"version: {bundle.version!r} must be numbers with dots, such as 1.0.2")
    if bundle.counter < 1:
        problems.append(f"counter: {bundle.counter} must be 1 or more")
    if not is_sha256(bundle.base_sha256):
        problems.append(f"base_sha256: {bundle.base_sha256!r} is no SHA-256")
    roles = [artifact.role for artifact in bundle.artifacts]
    if bundle.kind == "base" and "base" not in roles:
        problems.append("artifacts: none with the role 'base'")
    if bundle.kind == "adapter" and len([role for role in roles if role in ("adapter", "merged")]) != 1:
        problems.append("artifacts: an adapter has one with the role 'adapter' or 'merged', not both and not none")
    if "merged" in roles and bundle.scale != 1.0:
        problems.append(f"scale: {bundle.scale} of a merged model must be 1, its effect is in its weights")
    for index, artifact in enumerate(bundle.artifacts):
        if not is_sha256(artifact.sha256):
            problems.append(f"artifacts[{index}].sha256: {artifact.sha256!r} is no SHA-256")
        if artifact.size < 1:
            problems.append(f"artifacts[{index}].size: {artifact.size} must be 1 or more bytes")
        if artifact.pieces and (problem := _wrong_pieces(artifact)):
            problems.append(f"artifacts[{index}].pieces: {problem}")
        if "/" in artifact.name or "\\" in artifact.name or artifact.name in ("", ".", ".."):
            problems.append(f"artifacts[{index}].name: {artifact.name!r} must be a plain file name")
    if bundle.kind == "base" and bundle.base_sha256 not in {artifact.sha256 for artifact in bundle.artifacts}:
        problems.append("base_sha256: a base bundle must name one of its own artifacts")
    if problems:
        raise RecordError(problems, where=where)
    return bundle


def _wrong_pieces(artifact: Artifact) -> str | None:
    count = -(-artifact.size // PIECE)
    if len(artifact.pieces) != count:
        return f"{len(artifact.pieces)} of them, {artifact.size} bytes make {count}"
    if not all(map(is_sha256, artifact.pieces)):
        return "one is no SHA-256"
    if count == 1 and artifact.pieces != (artifact.sha256,):
        return "the only one must be the digest of the file"
    return None


def is_sha256(text: str) -> bool:
    """Tell whether the text is 64 lower-case hex digits, and so safe as a file name."""
    return _SHA256.fullmatch(text) is not None
