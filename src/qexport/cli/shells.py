"""What click's scripts for shells lack: values behind ``--option=``, and help with commas in fish."""

from __future__ import annotations

from itertools import pairwise

from click.shell_completion import BashComplete, FishComplete, ZshComplete, add_completion_class

VARIABLE = "_QEXPORT_COMPLETE"
"""What the shell sets when it asks."""


class _Bash(BashComplete):
    """Bash breaks ``--option=value`` into three words."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Words of the line, without the sign behind an option, and the one that is begun."""
        args, incomplete = super().get_completion_args()
        return [word for before, word in pairwise(["", *args]) if not _is_sign(before, word)], incomplete


class _Zsh(ZshComplete):
    """Zsh takes the whole word for the value, and would replace it."""

    source_template = ZshComplete.source_template.replace(
        "    for type key", "    [[ $PREFIX == --*=* ]] && compset -P 1 '*='\n\n    for type key", 1
    ).replace("compadd -U ", 'compadd -U -i "$IPREFIX" ')


class _Fish(FishComplete):
    """Fish wants the whole word, too; and click's script cuts what it is told at every comma."""

    source_template = (
        FishComplete.source_template.replace('(string split "," $completion)', '(string split -m 1 "," $completion)')
        .replace(
            "    for completion",
            "    set -l option (string match -r -- '^--[^=]+=' (commandline -ct));\n\n    for completion",
            1,
        )
        .replace(
            "__fish_complete_path $metadata[2];",
            'for path in (__fish_complete_path $metadata[2]);\n                echo "$option$path";\n            end;',
        )
        .replace("echo $metadata[2];", 'echo "$option$metadata[2]";')
    )


for _cls in (_Bash, _Zsh, _Fish):
    add_completion_class(_cls)


def _is_sign(before: str, word: str) -> bool:
    return word == "=" and before.startswith("--")
