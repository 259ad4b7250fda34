"""Small programs that check themselves: one for each captured state and each case of a tracker."""
