"""Networks: their files, their options and their modules. Knows no Ray."""
