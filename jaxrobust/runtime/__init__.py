"""What processes and machines need, whatever they compute: hosts, devices, files, flags."""
