"""`drivetrain --help`: what can be set, from the configuration's own fields and docstrings."""

from framework.compose import group_options
from framework.config_fields import config_fields, section_docs

HEAD = """usage: drivetrain [--config-dir DIR] key=value ... group=option ...

Runs reinforcement learning of a language model: SGLang engines, megatron-core trainers.
  drivetrain experiment=quickstart            the bundled demonstration
  drivetrain experiment=quickstart seed=1     the same, one thing changed
  drivetrain dry_run=true ...                 show what would run; start nothing
--config-dir DIR adds your own groups (DIR/experiment/mine.yaml: experiment=mine).
Exit status: 0 finished, 2 configuration refused, 1 failed, 130 interrupted."""


def help_text() -> str:
    """The whole help, one key a line."""
    lines = [HEAD, "", "Groups (group=option):"]
    lines += [f"  {name}={'|'.join(options)}" for name, options in group_options().items()]
    section = None
    for field in config_fields().values():
        top = field.key.split(".")[0] if "." in field.key else ""
        if top != section:
            section = top
            title = f"{top}: {section_docs()[top]}" if top else "The run:"
            lines += ["", title]
        default = '""' if field.default == "" else field.default
        lines.append(f"  {field.key}={default}  ({field.type_name})")
        if field.doc:
            lines.append(f"      {field.doc}")
    return "\n".join(lines)
