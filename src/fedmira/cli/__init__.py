"""The command line: thin commands that parse, call one function of the package and print what came back.

Every import of torch, transformers or a module that needs them happens inside the command that needs it, so that
`fedmira --help` and `fedmira validate` answer at once.
"""
