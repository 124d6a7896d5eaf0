"""python -m bem_peft_cli: the command `bem-peft`."""

import sys

from bem_peft_cli.main import main

sys.exit(main())
