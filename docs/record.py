#!/usr/bin/env python3
"""Generate docs/deploy.svg and docs/failure.svg, terminal screenshots of real deploys in the sandbox."""

from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples" / "sandbox"))

from bootstrap import use_environment  # noqa: E402

use_environment(HERE / "requirements.txt")

import pexpect  # type: ignore[import-untyped]  # noqa: E402
import pyte  # type: ignore[import-not-found]  # noqa: E402
from demo import COMMAND, commit, sandbox_and_app  # noqa: E402
from rich.console import Console  # type: ignore[import-not-found]  # noqa: E402
from rich.style import Style  # type: ignore[import-not-found]  # noqa: E402
from rich.terminal_theme import TerminalTheme  # type: ignore[import-not-found]  # noqa: E402
from rich.text import Text  # type: ignore[import-not-found]  # noqa: E402

COLUMNS, LINES = 90, 100
LAST_LINES_OF_A_FAILURE = 24
PASSWORD = "sandbox-password"  # which needs no encoding in a URL, like most
SVG = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace;
  font-size: {char_height}px;
}}
{styles}
</style>
<defs>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
THEME = TerminalTheme(
    background=(13, 17, 23),
    foreground=(230, 237, 243),
    # black, red, green, yellow, blue, magenta, cyan, white, then their bright variants
    normal=[(72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34),
            (88, 166, 255), (188, 140, 255), (57, 197, 207), (177, 186, 196)],
    bright=[(139, 148, 158), (255, 161, 152), (86, 211, 100), (227, 179, 65),
            (121, 192, 255), (210, 168, 255), (86, 212, 221), (255, 255, 255)],
)  # fmt: skip


def main() -> None:
    print("Deploying the sample app three times in the sandbox ...", flush=True)
    with sandbox_and_app(report=lambda line: None) as (sandbox, app):
        env = {**sandbox.buildkit_env, "CONVOX_STANDIN_CLI": "v3", "CONVOX_PASSWORD": PASSWORD}
        sandbox.check("./convox_deploy.py", cwd=app, env={**env, "APP_NAME": "hello"})
        (app / "www" / "index.html").write_text("v2\n")
        commit(app, "Sell more", env)
        draw(deploy_on_a_terminal(app, env, 0), "deploy.svg")
        with (app / "Dockerfile").open("a") as dockerfile:
            dockerfile.write("CMD echo Cannot connect to the database.; exit 3\n")
        draw(deploy_on_a_terminal(app, env, 1), "failure.svg", last=LAST_LINES_OF_A_FAILURE)


def draw(output: bytes, name: str, last: int = 0) -> None:
    """Draw the screen after a deploy or, with `last`, that number of lines at its end."""
    lines = screen_lines(output)[-last:]
    (HERE / name).write_text(svg_of(lines))
    print(f"Wrote docs/{name} ({len(lines)} lines).")


def deploy_on_a_terminal(app: Path, env: dict[str, str], expected: int) -> bytes:
    """Deploy the app on a terminal and return its output. Exit if it does not end with the expected exit code."""
    env = {name: value for name, value in env.items() if name not in ("NO_COLOR", "CI")}
    env.update(APP_NAME="hello", TERM="xterm-256color")
    # Run through env, because pexpect would look for ./convox_deploy.py in our own directory.
    how = {"cwd": app, "env": env, "dimensions": (LINES, COLUMNS), "timeout": None}
    output, status = pexpect.run("env ./convox_deploy.py", withexitstatus=True, **how)
    if status != expected:
        sys.exit(f"{output.decode(errors='replace')}\nThe deploy ended with exit code {status}.")
    return bytes(output)


def screen_lines(output: bytes) -> list[Text]:
    """Return the lines on the screen after typing the command and printing `output`, without trailing blank lines."""
    pyte.graphics.FG_AIXTERM[2] = "brightblack"  # pyte does not support dim text
    screen = pyte.Screen(COLUMNS, LINES)
    pyte.ByteStream(screen).feed(COMMAND.encode() + b"\r\n" + output)
    last = max(number for number, line in enumerate(screen.display) if line.strip())
    return [
        screen_line([screen.buffer[number][column] for column in range(COLUMNS)])
        for number in range(last + 1)
    ]


def screen_line(cells: list[pyte.screens.Char]) -> Text:
    line = Text()
    for style, alike in itertools.groupby(cells, style_of):
        line.append("".join(cell.data for cell in alike), style)
    line.rstrip()
    return line


def style_of(cell: pyte.screens.Char) -> Style:
    return Style(
        color=rich_color(cell.fg),
        bgcolor=rich_color(cell.bg),
        bold=cell.bold,
        italic=cell.italics,
        underline=cell.underscore,
        strike=cell.strikethrough,
        reverse=cell.reverse,
    )


def rich_color(name: str) -> str:
    """Convert pyte's name of a color to rich's. For 256-color values, pyte uses six hexadecimal digits."""
    if len(name) == 6 and set(name) <= set("0123456789abcdef"):
        return f"#{name}"
    return name.replace("brown", "yellow").replace("bright", "bright_")


def svg_of(lines: list[Text]) -> str:
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for line in lines:
        console.print(line, no_wrap=True)
    return str(console.export_svg(title="", theme=THEME, code_format=SVG, unique_id="deploy"))


if __name__ == "__main__":
    main()
