// Sum, or masked mean, over each run of `period` rows, or over each of its pieces of `each` rows: a workgroup takes `across` vec4s of the columns
// of one result, `down` invocations share the rows of each. Pieces of a masked mean leave their sums and `counts`, which the same kernel
// adds up (`carried`). An invocation takes at most {{ (each + 4 * down - 1) // (4 * down) + 3 }} steps, whose sums it adds up in blocks of {{ block }}.
{# Inside: row < rows, a result or a piece of one; t stays below the end of its piece, at most the end of its period, all rows of x; counts has
   an element for each piece; col < used, or < width where it is finished. lid + s < size, for lid < s <= size /
   2. #}
{% include "shared/group" %}
{% set size = across * down %}
{% if down > 1 %}
var<workgroup> sums: array<vec4<f32>, {{ size }}>;
{% if masked %}
var<workgroup> shared_counts: array<f32, {{ size }}>;
{% endif %}
{% endif %}

{% macro load(n, t) %}
{% if carried %}
            let m{{ n }} = mask_at({{ t }});
            let v{{ n }} = x_load(({{ t }}) * x_stride + col);
{% elif masked %}
            let m{{ n }} = mask_at({{ t }});
            let v{{ n }} = m{{ n }} * x_load(({{ t }}) * x_stride + col);
{% else %}
            let v{{ n }} = x_load(({{ t }}) * x_stride + col);
{% endif %}
{% endmacro %}

{% macro four(to) %}
{% for n in range(4) %}
{{ load(n, "t + " ~ n * down ~ "u") }}
{% endfor %}
            {{ to }}sum += (v0 + v1) + (v2 + v3);
{% if masked %}
            {{ to }}count += (m0 + m1) + (m2 + m3);
{% endif %}
{% endmacro %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let group = group_id(wid);
    let row = group / {{ tiles }}u;
    let col = group % {{ tiles }}u * {{ across }}u + lid % {{ across }}u;
    if (row >= {{ rows }}u) {
        return;
    }
    var sum = vec4<f32>();
    var count = 0.0;
    if (col < {{ used }}u) {
{% if pieces > 1 %}
        let begin = row / {{ pieces }}u * {{ period }}u;
        let piece = row % {{ pieces }}u;
        let end = begin + min((piece + 1u) * {{ each }}u, {{ period }}u);
        var t = begin + piece * {{ each }}u + lid / {{ across }}u;
{% else %}
        let end = (row + 1u) * {{ period }}u;
        var t = row * {{ period }}u + lid / {{ across }}u;
{% endif %}
        // Four rows in flight.
{% set step = 4 * down %}
{% set blocked = each > block * step %}
{% if blocked %}
        for (; t + {{ 3 * down }}u < end;) {
            let stop = min(t + {{ block * step }}u, end);
            var part_sum = vec4<f32>();
            var part_count = 0.0;
            for (; t + {{ 3 * down }}u < stop; t += {{ step }}u) {
{{ four("part_") }}
            }
            sum += part_sum;
            count += part_count;
        }
{% else %}
        for (; t + {{ 3 * down }}u < end; t += {{ step }}u) {
{{ four("") }}
        }
{% endif %}
        for (; t < end; t += {{ down }}u) {
{{ load(0, "t") }}
            sum += v0;
{% if masked %}
            count += m0;
{% endif %}
        }
    }
{% if down > 1 %}
    sums[lid] = sum;
{% if masked %}
    shared_counts[lid] = count;
{% endif %}
    for (var s = {{ size // 2 }}u; s >= {{ across }}u; s = s >> 1u) {
        workgroupBarrier();
        if (lid < s) {
            sums[lid] = sums[lid] + sums[lid + s];
{% if masked %}
            shared_counts[lid] = shared_counts[lid] + shared_counts[lid + s];
{% endif %}
        }
    }
    // Below `across` an invocation reads only what it wrote itself.
    if (lid >= {{ across }}u) {
        return;
    }
    sum = sums[lid];
{% if masked %}
    count = shared_counts[lid];
{% endif %}
{% endif %}
    if (col >= {{ width }}u) {
        return;
    }
{% if masked and leaves %}
    if (col == 0u) {
        counts_put(row, count);
    }
{% elif masked %}
    // Where the mask holds NaN the sum is NaN already.
    sum = sum / max(count, 1.0);
{% endif %}
    finish(row, col, sum);
}
