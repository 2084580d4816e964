"""A griffe extension that prepares the package for the API reference.

Doctests in docstrings become fenced blocks: Markdown takes a line that begins with `>>>` for a
quotation inside a quotation, and a list such as `[0, 1]` in the output for a link. And where a
package declares `__all__`, its modules show those names only, so that a new public name needs no
entry in docs/.
"""

from typing import Any

from griffe import Extension, Module, Object


def fence(text: str) -> str:
    """Put every run of lines from `>>>` to the next blank line into a fenced block."""
    lines, inside, indent = [], False, ""
    for line in text.splitlines():
        starts = line.lstrip().startswith(">>>")
        if starts and not inside:
            inside, indent = True, line[: len(line) - len(line.lstrip())]
            lines += ["", f"{indent}```pycon"]
        elif inside and not line.strip():
            inside = False
            lines.append(f"{indent}```")
        lines.append(line)
    if inside:
        lines.append(f"{indent}```")
    return "\n".join(lines)


class Reference(Extension):
    """Applied to every module that the API reference shows."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Hide what a subpackage with `__all__` does not export."""
        for package in pkg.modules.values():
            if not package.exports:
                continue
            public = {str(name) for name in package.exports}
            for module in package.modules.values():
                for member in module.members.values():
                    if not member.is_alias:
                        member.public = member.name in public

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring before it is parsed into sections."""
        if obj.docstring:
            obj.docstring.value = fence(obj.docstring.value)
