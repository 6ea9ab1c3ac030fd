"""What every part may use: errors, text, threads, atomic files, devices, processes, boxes."""
