"""What the site has beyond the pages of docs/: references generated from the code, the notebooks, and deploy/README.md.

Links to files that are not pages lead to the repository.
"""

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import nbformat
from google.protobuf import descriptor_pb2
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REPOSITORY = "https://github.com/sidelight-attribution/sidelight/blob/main"
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<path>(?!https?:|#|mailto:)[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
ELSEWHERE = {"deploy/README.md": "how-to/deploy.md"}  # pages whose sources are not in docs/
SCALAR_TYPES = {
    getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{name.upper()}"): name
    for name in ("double", "float", "int64", "uint64", "int32", "bool", "string", "bytes", "uint32", "sint32", "sint64")
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "how-to/deploy.md": _moved("deploy/README.md", "how-to/deploy.md"),
        "reference/python-api.md": _python_api(),
        "reference/grpc-api.md": _grpc_api(),
        "reference/command-line.md": _command_line(),
    }
    for path in sorted((DOCS / "notebooks").glob("*.ipynb")):
        page, pictures = _notebook(path)
        pages[f"notebooks/{path.stem}.md"] = page
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to notebooks to their pages, and links that leave docs/ to the repository."""
    here = DOCS / Path(page.file.src_uri).parent

    def absolute(link: re.Match[str]) -> str:
        target, anchor = (here / link["path"]).resolve(), link["anchor"] or ""
        if target.suffix == ".ipynb":
            return f"{link['text']}({link['path'].removesuffix('.ipynb')}.md{anchor})"
        if target.is_relative_to(DOCS):
            return link[0]
        inside = target.relative_to(ROOT).as_posix()
        if page_uri := ELSEWHERE.get(inside):
            depth = len(Path(page.file.src_uri).parent.parts)
            return f"{link['text']}({'../' * depth}{page_uri}{anchor})"
        return f"{link['text']}({REPOSITORY}/{inside}{anchor})"

    return LINK.sub(absolute, markdown)


def _moved(source: str, uri: str) -> str:
    """Return a page from elsewhere, with links that fit its place on the site."""
    here, place = (ROOT / source).parent, (DOCS / uri).parent

    def moved(link: re.Match[str]) -> str:
        return f"{link['text']}({os.path.relpath(here / link['path'], place)}{link['anchor'] or ''})"

    return LINK.sub(moved, (ROOT / source).read_text(encoding="utf-8"))


def _python_api() -> str:
    """Return the public names of the client, for mkdocstrings to document."""
    sections = {
        "The package": ("sidelight", "client/sidelight/__init__.py"),
        "Answers and their parts": ("sidelight.results", "client/sidelight/results/__init__.py"),
        "Exceptions": ("sidelight.exceptions", "client/sidelight/exceptions.py"),
    }
    lines = ["# Python API", "", "The names of the client `sidelight`, with their docstrings.", ""]
    known: set[str] = set()
    for title, (module, path) in sections.items():
        lines += [f"## {title}", ""]
        for name in _public(ROOT / path):
            if name in known or name in ("aio", "exceptions", "methods", "results"):
                continue
            known.add(name)
            lines += [f"::: {module}.{name}", "    options: {heading_level: 3}", ""]
    return "\n".join(lines)


def _public(path: Path) -> list[str]:
    """Return the names in a module's `__all__`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [str(each) for each in ast.literal_eval(node.value)]
    raise ValueError(f"{path}: no __all__")


def _command_line() -> str:
    command = [sys.executable, "-m", "typer", "sidelight._cli.app", "utils", "docs", "--name", "sidelight"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT / "client")
    return re.sub(r"^# .*$", "# Command line", done.stdout, count=1, flags=re.MULTILINE)


def _notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as a page, and its pictures by file name."""
    exporter = MarkdownExporter()
    body, resources = exporter.from_notebook_node(
        nbformat.read(path, as_version=4), {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    )
    return body, {str(name): content for name, content in resources["outputs"].items()}


def _grpc_api() -> str:
    """Return the schema as a page: each service, message and enum with its comments."""
    lines = [
        "# gRPC API",
        "",
        "The package `sidelight.v1`, from the comments of [the schema](../../proto/sidelight/v1).",
        "",
    ]
    for file in _descriptors():
        comments = {tuple(each.path): _text(each.leading_comments) for each in file.source_code_info.location}
        for i, service in enumerate(file.service):
            lines += [f"## {service.name}", "", comments.get((6, i), ""), ""]
            for j, method in enumerate(service.method):
                request, response = (_type_name(each) for each in (method.input_type, method.output_type))
                ways = ["stream " if each else "" for each in (method.client_streaming, method.server_streaming)]
                lines += [f"### {service.name}.{method.name}", ""]
                lines += [
                    f"`{method.name}({ways[0]}{request}) → {ways[1]}{response}`",
                    "",
                    comments.get((6, i, 2, j), ""),
                    "",
                ]
        for i, message in enumerate(file.message_type):
            lines += _message(message, (4, i), comments, prefix="")
        for i, enum in enumerate(file.enum_type):
            lines += _enum(enum, (5, i), comments, prefix="")
    return "\n".join(lines)


def _descriptors() -> Iterator[Any]:
    sources = sorted((ROOT / "proto").rglob("*.proto"), reverse=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "descriptors"
        include = package_files("grpc_tools") / "_proto"
        command = [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"--proto_path={ROOT / 'proto'}",
            f"--proto_path={include}",
        ]
        command += ["--include_source_info", f"--descriptor_set_out={out}", *map(str, sources)]
        subprocess.run(command, check=True)
        found = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    yield from sorted(found, key=lambda file: (not file.service, file.name))


def _message(message: Any, path: tuple[int, ...], comments: dict[tuple[int, ...], str], prefix: str) -> list[str]:
    name = prefix + message.name
    lines = [f"## {name}", "", comments.get(path, ""), ""]
    if message.field:
        lines += ["| field | type | |", "| --- | --- | --- |"]
    for i, field in enumerate(message.field):
        kind = SCALAR_TYPES.get(field.type) or _type_name(field.type_name)
        many = "repeated " if field.label == field.LABEL_REPEATED else ""
        of = f" (one of {message.oneof_decl[field.oneof_index].name})" if _is_choice(field) else ""
        text = _cell(comments.get((*path, 2, i), ""))
        lines.append(f"| `{field.name}` = {field.number} | {many}{kind}{of} | {text} |")
    lines.append("")
    for i, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            lines += _message(nested, (*path, 3, i), comments, f"{name}.")
    for i, enum in enumerate(message.enum_type):
        lines += _enum(enum, (*path, 4, i), comments, f"{name}.")
    return lines


def _enum(enum: Any, path: tuple[int, ...], comments: dict[tuple[int, ...], str], prefix: str) -> list[str]:
    lines = [f"## {prefix}{enum.name}", "", comments.get(path, ""), "", "| value | |", "| --- | --- |"]
    for i, value in enumerate(enum.value):
        lines.append(
            f"| `{value.name}` = {value.number} | {comments.get((*path, 2, i), '').replace('|', chr(92) + '|')} |"
        )
    return [*lines, ""]


def _text(comment: str) -> str:
    """Return a comment with one line for each paragraph."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in comment.replace("<", "&lt;").split("\n\n"))


def _cell(text: str) -> str:
    """Return text for a cell of a table."""
    return text.replace("|", "\\|").replace("\n\n", "<br>")


def _is_choice(field: Any) -> bool:
    return field.HasField("oneof_index") and not field.proto3_optional


def _type_name(name: str) -> str:
    return name.removeprefix(".").removeprefix("sidelight.v1.")
