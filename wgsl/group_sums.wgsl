// Sum, or masked mean, over each run of `period` rows: a workgroup takes `across` vec4s of the columns of one result, `down` invocations
// share the rows of each.
{# Inside: row < rows; t < (row + 1) period, all rows of x; col < used, or < width where it is finished. lid + s < size, for lid < s <= size /
   2. #}
{% include "shared/group" %}
{% set size = across * down %}
{% if down > 1 %}
var<workgroup> sums: array<vec4<f32>, {{ size }}>;
{% if masked %}
var<workgroup> counts: array<f32, {{ size }}>;
{% endif %}
{% endif %}

{% macro load(n, t) %}
{% if masked %}
            let m{{ n }} = mask_at({{ t }});
            let v{{ n }} = m{{ n }} * x_load(({{ t }}) * x_stride + col);
{% else %}
            let v{{ n }} = x_load(({{ t }}) * x_stride + col);
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
        let end = (row + 1u) * {{ period }}u;
        var t = row * {{ period }}u + lid / {{ across }}u;
        // Four rows in flight.
        for (; t + {{ 3 * down }}u < end; t += {{ 4 * down }}u) {
{% for n in range(4) %}
{{ load(n, "t + " ~ n * down ~ "u") }}
{% endfor %}
            sum += (v0 + v1) + (v2 + v3);
{% if masked %}
            count += (m0 + m1) + (m2 + m3);
{% endif %}
        }
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
    counts[lid] = count;
{% endif %}
    for (var s = {{ size // 2 }}u; s >= {{ across }}u; s = s >> 1u) {
        workgroupBarrier();
        if (lid < s) {
            sums[lid] = sums[lid] + sums[lid + s];
{% if masked %}
            counts[lid] = counts[lid] + counts[lid + s];
{% endif %}
        }
    }
    // Below `across` an invocation reads only what it wrote itself.
    if (lid >= {{ across }}u) {
        return;
    }
    sum = sums[lid];
{% if masked %}
    count = counts[lid];
{% endif %}
{% endif %}
    if (col >= {{ width }}u) {
        return;
    }
{% if masked %}
    sum = sum / max(count, 1.0);
{% endif %}
    finish(row, col, sum);
}
