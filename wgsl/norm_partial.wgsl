// Sum of squares of `each` vec4s a workgroup; `total` adds the parts up. An invocation adds up {{ each // lanes }} vec4s, in blocks of {{ block }}.
{% include "shared/group" %}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let part = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let end = min((part + 1u) * {{ each }}u, {{ count }}u);
    var sum = vec4<f32>();
{% if each > block * lanes %}
    for (var begin = part * {{ each }}u + lid % {{ lanes }}u; begin < end; begin += {{ block * lanes }}u) {
        let stop = min(begin + {{ block * lanes }}u, end);
        var part_sum = vec4<f32>();
        for (var i = begin; i < stop; i += {{ lanes }}u) {
            let v = x_load(i);
            part_sum += v * v;
        }
        sum += part_sum;
    }
{% else %}
    for (var i = part * {{ each }}u + lid % {{ lanes }}u; i < end; i += {{ lanes }}u) {
        let v = x_load(i);
        sum += v * v;
    }
{% endif %}
    let total = across(reduce(sum, lid));
    if (part < {{ parts }}u && lid % {{ lanes }}u == 0u) {
        y_put({{ first }}u + part, total);
{% if last %}
        if (part == {{ parts - 1 }}u) {
            for (var i = {{ first + parts }}u; i < y_stride; i++) {
                y_put(i, 0.0);
            }
        }
{% endif %}
    }
}
