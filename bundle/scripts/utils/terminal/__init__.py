"""What people see in a terminal: tables, colours, bars, numbers in words."""
