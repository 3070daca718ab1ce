"""What NITP costs beside NTP and beside multi-token prediction (MTP): measured, and counted at full size."""
