"""The command line, one file a group of commands.

Beside the package and not in it, so that `bem-peft --help` and a mistyped option need not wait for torch, transformers
and PEFT, which `import bem_peft` loads: nothing here imports it before a command runs.
"""
