"""What chooses the tokens of a verify: the draft, or one of the rules it is compared with."""
