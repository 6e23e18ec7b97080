# Regular expressions over generated log lines: bench.pl LINES
use strict;
use warnings;

my ($lines) = @ARGV;
my ($hits, %by) = (0);
my $state = 1;
for my $n (1 .. $lines) {
    $state = ($state * 1103515245 + 12345) & 0x7fffffff;
    my $line = sprintf '10.%d.%d.%d - user%d [%02d/Nov/2026:12:%02d:%02d] "GET /item/%d?q=%x HTTP/1.1" %d %d',
        $state & 255, $state >> 8 & 255, $state >> 16 & 255, $state % 100, $n % 28 + 1, $n % 60, $n % 59,
        $state % 5000, $state, $state % 7 ? 200 : 404, $state % 100000;
    if ($line =~ m{^(\d+(?:\.\d+){3}) \S+ (\w+) \[([^\]]+)\] "(GET|POST) (/\S*?)(?:\?(\S*))? HTTP/[\d.]+" (\d{3}) (\d+)$}) {
        $by{$2}{$7}++;
        # The substitution forgets what was captured.
        my ($path, $query) = ($5, $6 // '');
        $path =~ s/(\d+)/<$1>/g;
        $hits++ if $path =~ /<\d*([13579])>$/ && $query =~ /[a-f]{2,}/i;
    }
}
print "$hits ", scalar keys %by, "\n";
